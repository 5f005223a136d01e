"""Image classification on scikit-learn's handwritten digits."""
