"""What a federation cost, from its ledger to its page."""
