// Names for the tables of one instruction level: LEVEL is defined by the build.
#pragma once
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
