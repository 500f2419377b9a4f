"""One folder per method: its pure functions first, its adapters to LAVIS after them."""
