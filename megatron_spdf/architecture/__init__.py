"""What a model is: its parameters by name, in pure Python."""
