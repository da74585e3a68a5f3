"""What answers must look like, on the rank that samples."""
