"""From ledgers to reports: reading, sums, predictions, pages."""
