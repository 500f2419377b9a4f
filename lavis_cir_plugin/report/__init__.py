"""What a run shows: tables, files, contact sheets, curves, and the log it keeps while it trains."""
