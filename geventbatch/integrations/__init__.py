"""What makes the library at home in frameworks and servers; each module needs the one of its name."""
