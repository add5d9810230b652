"""What reflections cost in training, measured: `vreflection-train cost`."""
