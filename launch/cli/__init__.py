"""Root of the installed wheel: everything of the project lies under this one name."""
