"""Publishing a checkpoint: checks of the folder, one commit on the Hub, a read-back, a tag."""
