"""The public losses, one file a family: function, docstring, arguments."""
