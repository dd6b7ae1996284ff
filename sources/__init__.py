"""Where images come from: CIFAR's files, a folder of image files, drawn shapes. datasets.load picks among them."""
