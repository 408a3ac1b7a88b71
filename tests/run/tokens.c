/* Prints the tokens of every text on stdin, a line each: a text is its number of bytes as a line, then the bytes. Afterwards the text
 * that the tokens stand for, in the same form. */
#include <quern.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count, char** arguments) {
  quern_model* model;
  size_t bytes;
  if (count != 2 || quern_load(arguments[1], 1, &model) != QUERN_OK) {
    fprintf(stderr, "error: %s\n", quern_error());
    return 2;
  }
  while (scanf("%zu", &bytes) == 1 && getchar() == '\n') {
    char* text = malloc(bytes + 1);
    size_t tokens = 0, written = 0;
    if (fread(text, 1, bytes, stdin) != bytes) return 1;
    if (quern_tokenize(model, text, bytes, NULL, 0, &tokens) != QUERN_OK) {
      printf("error: %s\n0\n\n", quern_error());
      free(text);
      continue;
    }
    int32_t* ids = malloc((tokens + 1) * sizeof *ids);
    if (quern_tokenize(model, text, bytes, ids, tokens, &tokens) != QUERN_OK) return 1;
    for (size_t i = 0; i < tokens; ++i) printf(i == 0 ? "%d" : " %d", (int)ids[i]);
    if (quern_detokenize(model, ids, tokens, NULL, 0, &written) != QUERN_OK) return 1;
    char* back = malloc(written + 1);
    if (quern_detokenize(model, ids, tokens, back, written, &written) != QUERN_OK) return 1;
    printf("\n%zu\n", written);
    fwrite(back, 1, written, stdout);
    printf("\n");
    free(back);
    free(ids);
    free(text);
  }
  quern_free(model);
  return 0;
}
