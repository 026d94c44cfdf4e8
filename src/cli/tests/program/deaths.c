/*
 * Kills a process before one of the calls by which it changes a directory, for tests; preloaded into the program.
 *
 * DEATHS names the directory. Its unlink, rmdir, rename and fsync calls are counted from 1; before the one with the
 * number DIES_AT the process kills itself. To the file CALLS, if that is named, each call's name is written, one a line.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int calls;

static int is_in_directory(const char *path)
{
	const char *directory = getenv("DEATHS");

	return directory != NULL && strncmp(path, directory, strlen(directory)) == 0;
}

static void come_to(const char *call, const char *path)
{
	const char *dies_at = getenv("DIES_AT"), *told = getenv("CALLS");

	if (!is_in_directory(path))
		return;
	calls++;
	if (told != NULL)
	{
		int file = open(told, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
		dprintf(file, "%s\n", call);
		close(file);
	}
	if (dies_at != NULL && calls == atoi(dies_at))
		kill(getpid(), SIGKILL);
}

int unlink(const char *path)
{
	come_to("unlink", path);
	return ((int (*)(const char *)) dlsym(RTLD_NEXT, "unlink"))(path);
}

int rmdir(const char *path)
{
	come_to("rmdir", path);
	return ((int (*)(const char *)) dlsym(RTLD_NEXT, "rmdir"))(path);
}

int rename(const char *from, const char *to)
{
	come_to("rename", to);
	return ((int (*)(const char *, const char *)) dlsym(RTLD_NEXT, "rename"))(from, to);
}

int fsync(int file)
{
	char link[64], path[PATH_MAX];

	snprintf(link, sizeof link, "/proc/self/fd/%d", file);
	ssize_t length = readlink(link, path, sizeof path - 1);
	path[length > 0 ? length : 0] = '\0';
	come_to("fsync", path);
	return ((int (*)(int)) dlsym(RTLD_NEXT, "fsync"))(file);
}
