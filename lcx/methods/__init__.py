"""The methods of the book, one file each. `rope` is the rotation they all meet."""
