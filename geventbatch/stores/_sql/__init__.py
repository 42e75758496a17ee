"""What all stores in SQL databases share. Imports no vendor."""
