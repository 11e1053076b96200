"""What every folder may use and what knows none of them."""
