"""What all measurements share: the folder of rows, the page, and the style of pictures."""
