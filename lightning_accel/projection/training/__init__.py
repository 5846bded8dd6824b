"""What a training needs beside the functions: which parameters, which ball, how much of it at which step."""
