"""Every student beside every solver: tables, plots, one page."""
