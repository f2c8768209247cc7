"""What every room uses: messages for the user, files written whole, several processes."""
