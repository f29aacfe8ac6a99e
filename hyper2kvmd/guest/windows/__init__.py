"""What is done to a Windows."""
