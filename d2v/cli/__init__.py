"""The command `d2v`: one file for each group of commands."""
