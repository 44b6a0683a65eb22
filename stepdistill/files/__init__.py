"""Reading and writing of files: text that is checked, and replacement in one step."""
