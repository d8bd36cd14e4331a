"""Indexed files, preprocessing, the data ledger, windows, batches."""
