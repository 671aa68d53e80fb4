"""Programs that the tests start as processes of their own, and what they share with the tests."""
