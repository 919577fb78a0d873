"""What clients ask of the endpoint, and whether it may be answered."""
