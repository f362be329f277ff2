"""A page that shows what runs did: `sqft report`."""
