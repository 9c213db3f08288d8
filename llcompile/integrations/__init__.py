"""Other libraries: which releases were tested, and what is to be done when one of them is imported."""
