"""What a run would be: every check of its inputs, its sizes, and the least memory and time that it takes."""
