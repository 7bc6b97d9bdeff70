module frelay-party

go 1.19
