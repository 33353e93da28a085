"""What compression leaves of real networks' quality."""
