"""What a person sees of each result on the terminal. No number is computed here."""
