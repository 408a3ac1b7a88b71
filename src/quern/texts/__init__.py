"""What the user gives to read: files of text and of records become documents, documents become token ids."""
