"""What every trainer of this project shares: checkpoints, signals, meters, sample pictures, facts for the model card."""
