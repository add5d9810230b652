"""What reward adds where boxes run out."""
