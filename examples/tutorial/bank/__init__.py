"""The app of the tutorial on Django."""
