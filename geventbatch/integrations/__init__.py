"""The library at home in frameworks and servers; each module needs the package of its name."""
