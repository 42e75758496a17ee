"""What is seen of processors: how it is counted for those who watch."""
