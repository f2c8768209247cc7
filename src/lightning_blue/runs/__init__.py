"""What can be done with a run that was made: show it, undo edits, export and apply them."""
