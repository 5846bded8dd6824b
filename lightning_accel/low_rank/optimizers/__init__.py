"""What an optimizer keeps of its parameters, and how it follows when layers change."""
