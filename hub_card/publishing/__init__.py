"""Publishing a checkpoint: checks of the folder, one commit on the Hub, and a look at what arrived."""
