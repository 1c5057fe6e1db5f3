// What training and the engine have kernels for besides the products, at a level, against the plain one.
#pragma once

// The largest relative difference of any result of `level` from the plain level's; a result that is not finite counts as 1.
double training_difference(const char* level);
double engine_difference(const char* level);
