"""The application for one's own images: training and a report, then use at other hospitals."""
