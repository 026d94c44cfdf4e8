/*
 * Gates before the system calls by which the archiver stores a file, for tests; preloaded into a whole server.
 *
 * ARCHIVE_WITH_GATES names an archive, GATES a directory. While a file of a gate's name stands there, a thread waits at
 * that gate: "MILLISECONDS [NAME]", at most so long, and not with the WAL file NAME. Whoever waits makes the file
 * "held.GATE". Calls for anything outside the archive pass as ever.
 *
 * Each process also writes "PID STATUS" to the file "exits" there, as the very last thing before it exits: no such line
 * stands there for a process that was killed, has crashed, or left by _exit.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *archive, *gates;

static int (*next_fsync)(int);
static int (*next_fchmod)(int, mode_t);
static int (*next_linkat)(int, const char *, int, const char *, int);

static void tell_exit(int status, void *unused)
{
	char path[PATH_MAX], line[64];

	(void) unused;
	snprintf(path, sizeof path, "%s/exits", gates);
	int length = snprintf(line, sizeof line, "%d %d\n", (int) getpid(), status);
	int file = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (file >= 0 && write(file, line, length) != length)
		perror(path);
}

/* Before the C library registers anything of its own: what is registered first is called last. */
__attribute__((constructor)) static void begin(void)
{
	next_fsync = (int (*)(int)) dlsym(RTLD_NEXT, "fsync");
	next_fchmod = (int (*)(int, mode_t)) dlsym(RTLD_NEXT, "fchmod");
	next_linkat = (int (*)(int, const char *, int, const char *, int)) dlsym(RTLD_NEXT, "linkat");
	const char *storage = getenv("ARCHIVE_WITH_GATES"), *directory = getenv("GATES");
	if (storage == NULL || directory == NULL)
		return;
	/* Copies: PostgreSQL writes its titles where the environment was. */
	archive = strdup(storage);
	gates = strdup(directory);
	on_exit(tell_exit, NULL);
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

static int is_closed(const char *gate, const char *name, long waited_ms)
{
	char path[PATH_MAX], text[256], passes[128] = "";
	long most_ms = 0;

	snprintf(path, sizeof path, "%s/%s", gates, gate);
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return 0;
	ssize_t length = read(file, text, sizeof text - 1);
	close(file);
	if (length <= 0)
		return 0;
	text[length] = '\0';
	return sscanf(text, "%ld %127s", &most_ms, passes) >= 1 && waited_ms < most_ms && strcmp(passes, name) != 0;
}

static void wait_at(const char *gate, const char *name)
{
	const struct timespec pause = {.tv_nsec = 5000000};
	const long since = now_ms();
	const int error = errno;
	int is_held = 0;

	while (is_closed(gate, name, now_ms() - since))
	{
		if (!is_held)
		{
			char path[PATH_MAX];
			snprintf(path, sizeof path, "%s/held.%s", gates, gate);
			int mark = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
			if (mark >= 0)
				close(mark);
			is_held = 1;
		}
		nanosleep(&pause, NULL);
	}
	errno = error;
}

static int is_in_archive(const char *path)
{
	return archive != NULL && gates != NULL && strncmp(path, archive, strlen(archive)) == 0;
}

/* The path of an open file of the archive; empty for any other. */
static void path_of(int file, char path[PATH_MAX])
{
	char link[64];
	const int error = errno;

	snprintf(link, sizeof link, "/proc/self/fd/%d", file);
	ssize_t length = readlink(link, path, PATH_MAX - 1);
	path[length > 0 ? length : 0] = '\0';
	if (!is_in_archive(path))
		path[0] = '\0';
	errno = error;
}

static const char *name_of(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash == NULL ? path : slash + 1;
}

/* The first that is done to a staged file once it is opened. */
int fchmod(int file, mode_t mode)
{
	char path[PATH_MAX];
	int done = next_fchmod(file, mode);

	path_of(file, path);
	if (strstr(path, "/.staging/") != NULL)
		wait_at("opened", name_of(path));
	return done;
}

int fsync(int file)
{
	char path[PATH_MAX];

	path_of(file, path);
	if (strstr(path, "/.staging/") != NULL)
		wait_at("written", name_of(path));
	else if (strcmp(name_of(path), "main-xlog.db") == 0)
		wait_at("recorded", name_of(path));
	return next_fsync(file);
}

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags)
{
	const int is_wal = is_in_archive(to) && strstr(to, "/wals/") != NULL;

	if (is_wal)
		wait_at("durable", name_of(to));
	int done = next_linkat(from_directory, from, to_directory, to, flags);
	if (is_wal && done == 0)
		wait_at("published", name_of(to));
	return done;
}
