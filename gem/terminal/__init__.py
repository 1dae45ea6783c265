"""What is printed: text of a user or a model shown as it is, never obeyed; and how a command ends when it fails."""
