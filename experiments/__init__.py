"""What was measured for the documents, and the programs that measured it. Not installed: run from a checkout."""
