"""A tuned model beside the model it was made of, on preference data."""
