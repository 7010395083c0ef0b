"""The console commands of an installed package: links to the entry points of the repository."""
