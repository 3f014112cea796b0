"""What finished work says together: the table of variants, and what the tracker is told."""
