"""stub"""
def setup_logging(directory, rank, attempt, level): pass
