"""The start of a student: its values before training, in closed form from the teacher's activations on some text."""
