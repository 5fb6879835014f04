"""Tables, statistics and pictures of a study."""
